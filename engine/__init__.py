"""FlowServe: everything that runs inside one worker process.

No HTTP, no policy, no knowledge of other task executors' state. `types` and `config` are leaves that every
other folder may import; nothing in here imports `sched` or `scale`.
"""
