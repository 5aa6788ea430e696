"""The only code that knows HTTP. Decodes and checks what callers send, submits it to the service, and writes the service's
deltas in OpenAI's shapes. It decides nothing about scheduling and touches no TE: everything goes through `face.Service`.

    app.py      the application: routes, keys, request ids, the listening socket
    schema.py   what a request may hold, and how a wrong one is refused
    prompt.py   from a request's words to token ids, and whether they fit
    openai.py   /v1/completions and /v1/chat/completions
    shapes.py   replies and chunks, byte for byte
    limits.py   what a key may take, deadlines and targets, and the submission between
    sse.py      server-sent events without a coroutine per event
    admin.py    models, tokenize, health, metrics, jobs, task executors
    scaling.py  how many TEs there are: scale, sleep, wake, drain, and vLLM's names for them
    errors.py   OpenAI's error object
    client.py   the other end of the wire, for `chat`, `ps` and `bench serve`
    ps.py       what a server runs, as tables for a terminal
"""
