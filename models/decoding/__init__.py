"""Texts continued token by token on growing caches."""
