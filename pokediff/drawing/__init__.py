"""Drawing with a model: pictures, sheets, exports."""
