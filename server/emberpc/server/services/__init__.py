"""The four services of emberpc.v1: each turns a request into work of engine and index, and the outcome into a reply."""
