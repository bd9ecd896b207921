"""Dashboards as code: described once in Python, written as Grafana's JSON, and drawn without Grafana."""
