"""Tests of runtime/backends."""
