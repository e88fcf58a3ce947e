; SPDX-License-Identifier: MIT
; A symbolic differentiator, with the simplifications that keep its results readable. The value is the derivative, `size`
; times over, of x^6 + 3 x^2 y + 7, and what each of them is where x is 2 and y is 5.

(define (list3 a b c) (cons a (cons b (cons c '()))))
(define (second l) (car (cdr l)))
(define (third l) (car (cdr (cdr l))))

(define (is? x number) (and (number? x) (= x number)))

(define (sum a b)
  (cond ((and (number? a) (number? b)) (+ a b))
        ((is? a 0) b)
        ((is? b 0) a)
        (else (list3 '+ a b))))

(define (product a b)
  (cond ((and (number? a) (number? b)) (* a b))
        ((or (is? a 0) (is? b 0)) 0)
        ((is? a 1) b)
        ((is? b 1) a)
        ((and (number? a) (pair? b) (eq? (car b) '*) (number? (second b)))
         (product (* a (second b)) (third b)))
        (else (list3 '* a b))))

(define (power base exponent)
  (cond ((= exponent 0) 1)
        ((= exponent 1) base)
        (else (list3 '^ base exponent))))

(define (derivative of by)
  (cond ((number? of) 0)
        ((symbol? of) (if (eq? of by) 1 0))
        ((eq? (car of) '+)
         (sum (derivative (second of) by) (derivative (third of) by)))
        ((eq? (car of) '*)
         (sum (product (second of) (derivative (third of) by))
              (product (derivative (second of) by) (third of))))
        ((eq? (car of) '^)
         (product (product (third of) (power (second of) (- (third of) 1)))
                  (derivative (second of) by)))))

(define (to-the base exponent)
  (if (= exponent 0) 1 (* base (to-the base (- exponent 1)))))

(define (value of x y)
  (cond ((number? of) of)
        ((symbol? of) (if (eq? of 'x) x y))
        ((eq? (car of) '+) (+ (value (second of) x y) (value (third of) x y)))
        ((eq? (car of) '*) (* (value (second of) x y) (value (third of) x y)))
        (else (to-the (value (second of) x y) (third of)))))

(define (all left of values)
  (if (= left 0)
      (cons of values)
      (let ((next (derivative of 'x)))
        (all (- left 1) next (cons (value next 2 5) values)))))

(all size '(+ (^ x 6) (+ (* 3 (* (^ x 2) y)) 7)) '())
