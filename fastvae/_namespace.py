"""The name under which the operators are registered with torch."""

# A copy of the package in the same process (tools/hub.py) registers them under another.
NAMESPACE = "fastvae"
