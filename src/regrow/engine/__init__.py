"""The roof: joins what a method is with how it is computed; knows no particular method."""
