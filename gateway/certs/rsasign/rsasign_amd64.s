// SPDX-License-Identifier: Apache-2.0

//go:build !purego

#include "go_asm.h"
#include "textflag.h"

// Montgomery multiplication (P. L. Montgomery, "Modular Multiplication Without Trial Division") in digits of 52 bits, with
// AVX512-IFMA, which multiplies eight pairs of them at once and adds either half of the products (S. Gueron, V. Krasnov,
// "Software Implementation of Modular Exponentiation, Using Advanced Vector Instructions Architectures"). No branch and no
// address depends on a digit.
//
// # The sum
//
// A number is 20 digits, the lowest first, in the lanes of three registers; four lanes are zero. With R = 2^1040 the
// product of a and b is (a*b + q*m) / R, where q is what makes the division come out even. Digit by digit of b:
//
//	A += lo(a*b[i])
//	q  = lane 0 of A, times k0 = -1/m, modulo 2^52
//	A += lo(m*q)                    now the low 52 bits of lane 0 are zero
//	A  = A >> one lane              and what lane 0 had above 52 bits is added to its successor
//	A += hi(a*b[i]) + hi(m*q)       which belong one lane higher than lo
//
// Lanes have 64 bits: 20 rounds add 4*20 terms below 2^52 and carries, less than 2^59, so they are made digits again
// only at the end. What holds up is the way from one q to the next. So lane 0 of what doesn't need q, hi(a*b[i]) and
// lo(a*b[i+1]), is summed up beside it, in W, and the two moduli are taken at once, since neither waits for the other.
//
// # Bounds
//
// m is below 2^1024, so R is more than 2^16 m. For a and b below 64 m, a*b/R is below m/16, and for a below R and b below m
// it is below m. q is below R, so the result, (a*b + q*m)/R, is below 2m, and nothing is ever subtracted.
//
// Registers, for the first modulus and the second:
//
//	Z0-Z2   Z3-Z5    A           DI  result, SI a, DX b, BX modulus
//	Z6-Z8   Z9-Z11   a           CX  rounds left
//	Z12-Z14 Z15-Z17  m           Z28 zero
//	Z18     Z19      k0          Z29 2^52-1
//	Z20     Z21      W           Z30, Z31 scratch
//	Z22     Z23      b[i]        K1  lane 0
//	Z24     Z25      b[i+1]
//	Z26     Z27      q

// QUOTIENT is q, from lane 0.
#define QUOTIENT(XA0, K0, T, Q) \
	VPBROADCASTQ XA0, T   \
	VPXORQ       Q, Q, Q  \
	VPMADD52LUQ  T, K0, Q

// ROUND does the rest of it, and begins the next one.
#define ROUND(A0, A1, A2, a0, a1, a2, m0, m1, m2, W, B, NEXT, Q, T) \
	VPXORQ      W, W, W        \
	VPMADD52HUQ a0, B, W       \
	VPMADD52LUQ a0, NEXT, W    \
	VPMADD52LUQ m0, Q, A0      \
	VPMADD52LUQ m1, Q, A1      \
	VPMADD52LUQ m2, Q, A2      \
	VPMADD52HUQ m0, Q, W       \
	VPSRLQ.Z    $52, A0, K1, T \
	VPADDQ      T, W, W        \
	VALIGNQ     $1, A0, A1, A0 \
	VALIGNQ     $1, A1, A2, A1 \
	VALIGNQ     $1, A2, Z28, A2 \
	VPADDQ      W, A0, A0      \
	VPMADD52HUQ a1, B, A1      \
	VPMADD52HUQ a2, B, A2      \
	VPMADD52LUQ a1, NEXT, A1   \
	VPMADD52LUQ a2, NEXT, A2   \
	VPMADD52HUQ m1, Q, A1      \
	VPMADD52HUQ m2, Q, A2

// DIGITS makes the lanes digits. Once what they have above 52 bits is added to their successors, a lane can have one bit
// too many (over), or pass one on because it has 52 ones (full). One addition finds out who gets one: a carry runs through
// the bits of full, as it does through the lanes.
#define DIGITS(A0, A1, A2) \
	VPSRLQ   $52, A0, Z20       \
	VPSRLQ   $52, A1, Z21       \
	VPSRLQ   $52, A2, Z22       \
	VPANDQ   Z29, A0, A0        \
	VPANDQ   Z29, A1, A1        \
	VPANDQ   Z29, A2, A2        \
	VALIGNQ  $7, Z28, Z20, Z23  \
	VALIGNQ  $7, Z20, Z21, Z24  \
	VALIGNQ  $7, Z21, Z22, Z25  \
	VPADDQ   Z23, A0, A0        \
	VPADDQ   Z24, A1, A1        \
	VPADDQ   Z25, A2, A2        \
	VPCMPUQ  $6, Z29, A0, K2    \
	VPCMPUQ  $6, Z29, A1, K3    \
	VPCMPUQ  $6, Z29, A2, K4    \
	VPCMPUQ  $0, Z29, A0, K5    \
	VPCMPUQ  $0, Z29, A1, K6    \
	VPCMPUQ  $0, Z29, A2, K7    \
	KUNPCKBW K2, K3, K3         \
	KUNPCKBW K5, K6, K6         \
	KMOVW    K3, R8             \
	KMOVW    K6, R9             \
	KMOVB    K4, R10            \
	KMOVB    K7, R11            \
	SHLL     $16, R10           \
	SHLL     $16, R11           \
	ORL      R10, R8            \
	ORL      R11, R9            \
	LEAL     (R9)(R8*2), R8     \
	XORL     R9, R8             \
	KMOVB    R8, K2             \
	SHRL     $8, R8             \
	KMOVB    R8, K3             \
	SHRL     $8, R8             \
	KMOVB    R8, K4             \
	VPADDQ   Z30, A0, K2, A0    \
	VPADDQ   Z30, A1, K3, A1    \
	VPADDQ   Z30, A2, K4, A2    \
	VPANDQ   Z29, A0, A0        \
	VPANDQ   Z29, A1, A1        \
	VPANDQ   Z29, A2, A2

// CLEAR leaves no digit behind, of a prime or of what is made of one: neither for what runs next, nor in the memory that
// registers are saved to when threads switch. VZEROALL knows the first 16 registers only.
#define CLEAR \
	VZEROALL; \
	VPXORQ Z16, Z16, Z16; \
	VPXORQ Z17, Z17, Z17; \
	VPXORQ Z18, Z18, Z18; \
	VPXORQ Z19, Z19, Z19; \
	VPXORQ Z20, Z20, Z20; \
	VPXORQ Z21, Z21, Z21; \
	VPXORQ Z22, Z22, Z22; \
	VPXORQ Z23, Z23, Z23; \
	VPXORQ Z24, Z24, Z24; \
	VPXORQ Z25, Z25, Z25; \
	VPXORQ Z26, Z26, Z26; \
	VPXORQ Z27, Z27, Z27; \
	VPXORQ Z28, Z28, Z28; \
	VPXORQ Z29, Z29, Z29; \
	VPXORQ Z30, Z30, Z30; \
	VPXORQ Z31, Z31, Z31

// func multiply(result, a, b *pair, m *moduli)
TEXT ·multiply(SB), NOSPLIT, $0-32
	MOVQ         result+0(FP), DI
	MOVQ         a+8(FP), SI
	MOVQ         b+16(FP), DX
	MOVQ         m+24(FP), BX
	VPXORQ       Z28, Z28, Z28
	MOVL         $1, CX
	KMOVB        CX, K1
	VMOVDQU64    (SI), Z6
	VMOVDQU64    64(SI), Z7
	VMOVDQU64    128(SI), Z8
	VMOVDQU64    192(SI), Z9
	VMOVDQU64    256(SI), Z10
	VMOVDQU64    320(SI), Z11
	VMOVDQU64    (moduli_m+0)(BX), Z12
	VMOVDQU64    (moduli_m+64)(BX), Z13
	VMOVDQU64    (moduli_m+128)(BX), Z14
	VMOVDQU64    (moduli_m+192)(BX), Z15
	VMOVDQU64    (moduli_m+256)(BX), Z16
	VMOVDQU64    (moduli_m+320)(BX), Z17
	VPBROADCASTQ (moduli_k0+0)(BX), Z18
	VPBROADCASTQ (moduli_k0+8)(BX), Z19
	VPBROADCASTQ (DX), Z24
	VPBROADCASTQ 192(DX), Z25
	VPXORQ       Z0, Z0, Z0
	VPXORQ       Z1, Z1, Z1
	VPXORQ       Z2, Z2, Z2
	VPXORQ       Z3, Z3, Z3
	VPXORQ       Z4, Z4, Z4
	VPXORQ       Z5, Z5, Z5
	VPMADD52LUQ  Z6, Z24, Z0
	VPMADD52LUQ  Z7, Z24, Z1
	VPMADD52LUQ  Z8, Z24, Z2
	VPMADD52LUQ  Z9, Z25, Z3
	VPMADD52LUQ  Z10, Z25, Z4
	VPMADD52LUQ  Z11, Z25, Z5
	MOVL         $20, CX

digit:
	QUOTIENT(X0, Z18, Z30, Z26)
	QUOTIENT(X3, Z19, Z31, Z27)
	VMOVDQA64    Z24, Z22
	VMOVDQA64    Z25, Z23
	VPBROADCASTQ 8(DX), Z24
	VPBROADCASTQ 200(DX), Z25
	ADDQ         $8, DX
	ROUND(Z0, Z1, Z2, Z6, Z7, Z8, Z12, Z13, Z14, Z20, Z22, Z24, Z26, Z30)
	ROUND(Z3, Z4, Z5, Z9, Z10, Z11, Z15, Z16, Z17, Z21, Z23, Z25, Z27, Z31)
	SUBL         $1, CX
	JNZ          digit

	VPTERNLOGQ $0xff, Z29, Z29, Z29
	VPSRLQ     $63, Z29, Z30       // one
	VPSRLQ     $12, Z29, Z29
	DIGITS(Z0, Z1, Z2)
	DIGITS(Z3, Z4, Z5)
	VMOVDQU64  Z0, (DI)
	VMOVDQU64  Z1, 64(DI)
	VMOVDQU64  Z2, 128(DI)
	VMOVDQU64  Z3, 192(DI)
	VMOVDQU64  Z4, 256(DI)
	VMOVDQU64  Z5, 320(DI)
	CLEAR
	KXORW      K1, K1, K1
	KXORW      K2, K2, K2
	KXORW      K3, K3, K3
	KXORW      K4, K4, K4
	KXORW      K5, K5, K5
	KXORW      K6, K6, K6
	KXORW      K7, K7, K7
	XORL       R8, R8
	XORL       R9, R9
	XORL       R10, R10
	XORL       R11, R11
	RET

// func choose(result *pair, table *[window]pair, first, second uint64)
//
// It reads the whole table, so that no cache tells what was chosen.
TEXT ·choose(SB), NOSPLIT, $0-32
	MOVQ         result+0(FP), DI
	MOVQ         table+8(FP), SI
	VPBROADCASTQ first+16(FP), Z6
	VPBROADCASTQ second+24(FP), Z7
	VPXORQ       Z8, Z8, Z8 // number of the entry
	VPTERNLOGQ   $0xff, Z9, Z9, Z9
	VPSRLQ       $63, Z9, Z9
	MOVL         $const_entries, CX

entry:
	VPCMPEQQ  Z6, Z8, K1
	VPCMPEQQ  Z7, Z8, K2
	VMOVDQU64 (SI), Z10
	VMOVDQU64 64(SI), Z11
	VMOVDQU64 128(SI), Z12
	VMOVDQU64 192(SI), Z13
	VMOVDQU64 256(SI), Z14
	VMOVDQU64 320(SI), Z15
	VMOVDQA64 Z10, K1, Z0
	VMOVDQA64 Z11, K1, Z1
	VMOVDQA64 Z12, K1, Z2
	VMOVDQA64 Z13, K2, Z3
	VMOVDQA64 Z14, K2, Z4
	VMOVDQA64 Z15, K2, Z5
	VPADDQ    Z9, Z8, Z8
	ADDQ      $const_pairSize, SI
	SUBL      $1, CX
	JNZ       entry
	VMOVDQU64 Z0, (DI)
	VMOVDQU64 Z1, 64(DI)
	VMOVDQU64 Z2, 128(DI)
	VMOVDQU64 Z3, 192(DI)
	VMOVDQU64 Z4, 256(DI)
	VMOVDQU64 Z5, 320(DI)
	VZEROALL
	KXORW     K1, K1, K1
	KXORW     K2, K2, K2
	RET
