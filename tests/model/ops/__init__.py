"""Tests of the attention operators."""
