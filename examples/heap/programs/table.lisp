; SPDX-License-Identifier: MIT
; A table of chained buckets in one vector, which soon is old: each store into it is one that a write barrier must see.
; Numbers from a generator are counted in it, then sorted by a merge sort. The value is a list: how many different ones
; there were, how often the most frequent one came, and a checksum over all in order.

(define (next seed) (remainder (+ (* seed 1103515245) 12345) 2147483648))

(define table (make-vector 61 '()))

(define (find key bucket)
  (cond ((null? bucket) '())
        ((= (car (car bucket)) key) (car bucket))
        (else (find key (cdr bucket)))))

(define (note key)
  (let* ((at (remainder key 61))
         (known (find key (vector-ref table at))))
    (if (null? known)
        (vector-set! table at (cons (cons key 1) (vector-ref table at)))
        (set-cdr! known (+ 1 (cdr known))))))

(define (fill left seed)
  (if (> left 0)
      (begin (note (remainder (quotient seed 65536) size))
             (fill (- left 1) (next seed)))))

(define (join bucket others) ; a new list, of new pairs
  (if (null? bucket)
      others
      (cons (cons (car (car bucket)) (cdr (car bucket))) (join (cdr bucket) others))))

(define (everything at found)
  (if (= at (vector-length table))
      found
      (everything (+ at 1) (join (vector-ref table at) found))))

(define (merge one other)
  (cond ((null? one) other)
        ((null? other) one)
        ((< (car (car one)) (car (car other))) (cons (car one) (merge (cdr one) other)))
        (else (cons (car other) (merge one (cdr other))))))

(define (every-other l) (if (or (null? l) (null? (cdr l))) l (cons (car l) (every-other (cdr (cdr l))))))

(define (sort l)
  (if (or (null? l) (null? (cdr l)))
      l
      (merge (sort (every-other l)) (sort (every-other (cdr l))))))

(define (length l) (if (null? l) 0 (+ 1 (length (cdr l)))))
(define (most l so-far) (if (null? l) so-far (most (cdr l) (if (< so-far (cdr (car l))) (cdr (car l)) so-far))))
(define (checksum l so-far)
  (if (null? l)
      so-far
      (checksum (cdr l) (remainder (+ (* so-far 31) (+ (car (car l)) (cdr (car l)))) 1000003))))

(fill (* 10 size) 1)
(let ((sorted (sort (everything 0 '()))))
  (cons (length sorted) (cons (most sorted 0) (cons (checksum sorted 0) '()))))
