"""A small inventory, not finished: put a cursor at the end of a line and complete it."""


class Item:
    def __init__(self, name, price, quantity):
        self.name = name
        self.price = price
        self.quantity = quantity


class Inventory:
    def __init__(self, items):
        self.items = it

    def add(self, item):
        self.items.ap

    def total(self):
        total = 0
        for item in self.items:
            total += item.price * item.quantity
        return total

    def find(self, name):
        for item in self.items:
            if item.name == name:
                return it
        return None
