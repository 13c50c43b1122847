"""Ask other completion servers, to compare with them."""
