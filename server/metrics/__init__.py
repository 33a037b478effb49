"""Prometheus metrics of one server, on the HTTP side (README.md)."""

from server.metrics.families import names as names
from server.metrics.requests import FinishedRequest as FinishedRequest
from server.metrics.requests import Metrics as Metrics
from server.metrics.requests import length_buckets as length_buckets
from server.metrics.steps import StepTotals as StepTotals
