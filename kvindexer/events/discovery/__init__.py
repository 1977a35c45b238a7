"""Sources that nobody names: the pods of engines, as the API server of a Kubernetes cluster tells of them.

    selectors   a label selector as text ─► requirements
    pods        pods and InferencePools as the API server writes them
    reading     one pod, its annotations and the settings ─► sources, a question to its engine, or what is wrong
    plan        all pods ─► all sources, one owner each
    cluster     list and watch, by a client library; the only module that knows it
    watching    one list kept up to date: watch, relist, back off
    pools       an InferencePool kept up to date, and with it the list of its pods
    engines     what the engines themselves are asked
    finder      all of that, and the fleet: `Finder` of `events.finding`

Everything above `cluster` is free of I/O.
"""
