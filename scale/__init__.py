"""How workers come and go: where a model's files come from, the keeper that packs and forks, and the ladder from a cold start
to a task executor that serves.

Runs partly in the control process and partly in the keeper, never in a worker. It imports `engine`, and knows nothing of
requests, jobs or HTTP.
"""
