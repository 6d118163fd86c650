from __future__ import annotations

from hypothesis import settings

# On a busy machine an example may take longer than hypothesis' default deadline of 200 ms.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
