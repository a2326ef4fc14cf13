"""Checkpoints of YOLOv5's and YOLOv7's own repositories, read without running them."""
