"""One file a family of schedules; each recipe yields the compute actions of one rank and knows nothing else."""
