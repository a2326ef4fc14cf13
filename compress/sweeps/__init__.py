"""Many pipelines: what to run, here or on a cluster, and when to give one up."""
