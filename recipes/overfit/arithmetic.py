def add(a, b):
    return a + b


def subtract(a, b):
    return a - b


def multiply(a, b):
    total = 0
    for _ in range(b):
        total = add(total, a)
    return total


def divide(a, b):
    if b == 0:
        raise ZeroDivisionError("divide by zero")
    return a // b


def power(base, exponent):
    result = 1
    for _ in range(exponent):
        result = multiply(result, base)
    return result


def fizz_buzz(n):
    for i in range(1, n + 1):
        if i % 15 == 0:
            print("FizzBuzz")
        elif i % 3 == 0:
            print("Fizz")
        elif i % 5 == 0:
            print("Buzz")
        else:
            print(i)


if __name__ == "__main__":
    fizz_buzz(power(2, 4))
