"""Tests of runtime/models."""
