"""A Hugging Face Hub for tests: the requests of the real client, answered by the standard library alone.

It keeps what the real Hub keeps that matters to a push or a pull: commits and branches, LFS objects addressed and
checked by their sha256, ETags and byte ranges, downloads of large files from another host, private, gated and renamed
repositories, error codes, rate limits. Every request is logged; faults can be ordered. The routes, read from top to
bottom, are the list of what the client asks.

```python
server = HubServer().start()
server.add_user("alice", "alice-token")
server.fail("POST", r"/commit/", status=500)      # the next commit fails
```
"""

from __future__ import annotations

from hub_server import account, download, upload  # the routes register themselves
from hub_server.server import HubServer
from hub_server.state import ALICE_TOKEN

__all__ = ["ALICE_TOKEN", "HubServer", "account", "download", "upload"]
