"""One file per runtime: `load`, `infer`, `describe`. Each imports numpy and its own runtime, nothing else."""
