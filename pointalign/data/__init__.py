"""Point clouds, conversations and the embedded objects; imports neither the models nor the trainer."""

from pointalign.data.conversations import AnnotationError, Conversation, load_conversations, to_messages
from pointalign.data.point_cloud import PointCloudError, load_point_cloud, normalise, subsample

__all__ = [
    "AnnotationError",
    "Conversation",
    "PointCloudError",
    "load_conversations",
    "load_point_cloud",
    "normalise",
    "subsample",
    "to_messages",
]
