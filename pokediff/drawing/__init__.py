"""How a model is used: pictures, sheets, exports."""
