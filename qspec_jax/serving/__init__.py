"""Requests over HTTP, as clients of OpenAI's API send them: the protocol, the limits, the metrics, the server."""
