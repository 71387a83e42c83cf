"""A typed client of the gRPC door."""

from clients.python.client import Answer, ChatError, InferenceClient

__all__ = ["Answer", "ChatError", "InferenceClient"]
