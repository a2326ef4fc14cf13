"""Ultralytics' training, taught sparsity, fading, distillation and pruned shapes."""
