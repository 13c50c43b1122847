"""A small inventory, for a first completion: put a cursor anywhere and try."""

from dataclasses import dataclass


@dataclass
class Item:
    name: str
    price: float
    quantity: int


class Inventory:
    def __init__(self, items):
        self.items = list(items)

    def add(self, item):
        self.items.append(item)

    def remove(self, item):
        self.items.re

    def total(self):
        total = 0.0
        for item in self.items:
            total +=
        return total

    def find(self, name):
        for item in self.items:
            if item.name == name:
                return 
        return None
