"""Jobs: a run on a cluster, queued, killed and started again."""
