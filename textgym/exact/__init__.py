"""Exact solutions of small token MDPs."""
