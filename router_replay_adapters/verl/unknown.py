"""The value that stands where a route is not known, in verl's arrays as in SGLang's format of this package."""

UNKNOWN = -1
"""No expert's number: `int16 [..., K]` of it says that nobody recorded what a token took in a layer."""
