"""The search gateway, `dpsr search`: recall, coarse ranking, fine ranking and re-ranking, over REST and gRPC.

    messages    requests and answers, and their form in JSON
    config      the YAML file of pipelines
    pipeline    one request through the stages of a pipeline
    server      REST and gRPC

docs/search.md explains the whole.
"""
