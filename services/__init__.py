"""What every process does the same way; knows none of them."""

import os

# gRPC's core writes lines of its own to stderr, before it is asked to fail; every failure reaches us as an exception and is told once.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
