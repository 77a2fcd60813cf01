"""The web page of `pointalign demo`: ask about clouds, and see where the model looks."""
