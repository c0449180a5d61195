"""Block jobs: `state` (the tables), `job` (what a job is), `runner` (who walks the tables), and one module or more for each.

Models QEMU's jobs (semantics.md sections 3 and 4). Jobs do not import one another; `copying` is what those that copy share, and
a job's own filter node stands beside it (`mirror_top`, `stream_top`, `commit_top`), made on `job_filter`.
"""
