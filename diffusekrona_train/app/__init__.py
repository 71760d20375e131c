"""The studio: pages over run folders, in a browser. `krona-studio` serves them; every state is a file in a folder.

| module | what it holds |
|---|---|
| `guard` | which requests are answered at all |
| `runs` | what a run folder says |
| `jobs` | starting, stopping and queueing training, each run in a process of its own |
| `draft`, `form` | the subject that is being prepared; config fields from the schema |
| `worker` | what needs torch, in one other process |
| `server`, `subject`, `watch`, `use` | the application and its pages |
"""
