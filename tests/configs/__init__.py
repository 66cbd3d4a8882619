"""Tests of configs: composing, strictness, checks."""
