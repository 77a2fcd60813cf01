"""Point clouds, conversations and batches; imports neither the models nor the trainer."""
