"""Integrations with other training libraries; each is imported only by code that uses it."""
