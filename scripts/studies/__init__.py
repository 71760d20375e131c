"""What scripts/paper.py is made of: studies from YAML, tasks, records, the pool of workers, tables and figures."""
