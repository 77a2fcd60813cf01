"""A grounding certificate for any 3D vision-language model: does it look at the cloud, or guess from the question?"""
