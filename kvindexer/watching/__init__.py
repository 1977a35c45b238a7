"""What operators see of the service's work: log lines and traces; metrics are in `api.metrics`.

logs        records as lines, of text or JSON
work        what one request did, counted while it is answered
requests    the one line of a request
tracing     spans for a collector; imported only where there is one
"""
