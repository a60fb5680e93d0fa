"""potstill: on-policy distillation of language models as a service.

This package holds what every room shares: configuration, carriers, wire format, errors, clients and the command line.
It imports no torch, ray, vllm or fastapi, so that `potstill --help` is instant and a client installs in seconds.
"""

__version__ = "0.1.0"
