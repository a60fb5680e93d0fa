"""What tests give clients of http to check certificates with: nobody is trusted, and no authorities are read.

To read the machine's takes a client 30 ms, which is longer than most tests that make one.
"""

from __future__ import annotations

import ssl

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
