"""Calls that leave this machine: where they may go, how often they are made, when to give up, what they may cost.

    outbound.py     one endpoint, and the one layer that retries      guard.py     which addresses may be called
    concurrency.py  as many at once as the other side bears           breaker.py   leaving alone what keeps failing
    meter.py        tokens, dollars and a budget                      quoting.py   complaints without what was sent

Nothing here knows what is called or why.
"""
