"""The studio: pages over run folders. `guard` decides what is answered, `draft` holds the subject that is being
prepared, `jobs` starts and queues runs, `worker` does what needs torch; `server` gathers the pages."""
