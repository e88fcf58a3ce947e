; SPDX-License-Identifier: MIT
; In how many ways `size` queens stand on a board of that size so that none attacks another.

(define (safe? row distance placed)
  (or (null? placed)
      (and (not (= (car placed) row))
           (not (= (car placed) (+ row distance)))
           (not (= (car placed) (- row distance)))
           (safe? row (+ distance 1) (cdr placed)))))

(define (place column placed)
  (if (= column size)
      1
      (let try ((row 1) (found 0))
        (cond ((> row size) found)
              ((safe? row 1 placed) (try (+ row 1) (+ found (place (+ column 1) (cons row placed)))))
              (else (try (+ row 1) found))))))

(place 0 '())
