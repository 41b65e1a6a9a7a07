"""The chapters of the results book: each turns one record into tables and a short reading of them."""
