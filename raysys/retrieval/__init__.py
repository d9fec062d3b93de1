"""The search service that an agent talks to, and the client it talks with."""
