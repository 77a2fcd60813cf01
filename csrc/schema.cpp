// The schemas of the native point ops; pointalign_kernels/point_ops.py adds the fakes and the public functions.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pointalign_kernels, library) {
  library.def("farthest_point_sample(Tensor points, int num_samples, int start_index, Tensor? lengths) -> Tensor");
  library.def("knn(Tensor query, Tensor points, int k, Tensor? lengths) -> (Tensor, Tensor)");
  library.def("group_points(Tensor points, Tensor centre_index, int k, Tensor? lengths, ScalarType dtype) -> Tensor");
  library.def("instruction_set() -> str");
}
