; SPDX-License-Identifier: MIT
; GCBench, after Ellis, Kovac and Boehm: binary trees, made top down and bottom up, beside one tree and one vector that
; live long. `size` is the depth of the long-lived tree. The value is the number of all nodes that were counted.

(define (count tree)
  (if (null? tree) 0 (+ 1 (count (car tree)) (count (cdr tree)))))

(define (bottom-up depth)
  (if (= depth 0)
      (cons '() '())
      (cons (bottom-up (- depth 1)) (bottom-up (- depth 1)))))

(define (populate depth node) ; top down: pointers from old nodes to new ones
  (if (= depth 0)
      '()
      (begin
        (set-car! node (cons '() '()))
        (set-cdr! node (cons '() '()))
        (populate (- depth 1) (car node))
        (populate (- depth 1) (cdr node)))))

(define (top-down depth)
  (let ((node (cons '() '())))
    (populate depth node)
    node))

(define (fill vector)
  (let loop ((i 0))
    (if (< i (vector-length vector))
        (begin (vector-set! vector i (cons i '())) (loop (+ i 1)))
        vector)))

(define (sum vector)
  (let loop ((i 0) (total 0))
    (if (< i (vector-length vector))
        (loop (+ i 1) (+ total (car (vector-ref vector i))))
        total)))

(define long-lived (top-down size))
(define elements (fill (make-vector (* 16 size) '())))

(define (trees depth)
  (let loop ((left (quotient (* 4 size) depth)) (total 0))
    (if (= left 0)
        total
        (loop (- left 1) (+ total (count (top-down depth)) (count (bottom-up depth)))))))

(define (all depth total)
  (if (> depth size)
      total
      (all (+ depth 2) (+ total (trees depth)))))

(let ((short-lived (all 2 0)))
  (+ short-lived (count long-lived) (sum elements)))
