// SPDX-License-Identifier: Apache-2.0

//go:build !purego

#include "go_asm.h"
#include "textflag.h"

// AES-GCM (NIST SP 800-38D) sixteen blocks at a time: AES in counter mode with VAES, GHASH with VPCLMULQDQ, both on four
// blocks an instruction. No branch and no address depends on a key, a nonce or a byte of text; lengths, the number of
// rounds and the direction are public.
//
// # GHASH with a carry-less multiplier
//
// GHASH reads a block as a polynomial over GF(2) modulo x^128+x^7+x^2+x+1 whose x^0 is the *first* bit of the first byte.
// With its bytes reversed a block is a 128-bit number in which bit 127-i is the coefficient of x^i: reflected. The
// carry-less product of two reflected numbers is the reflected product, one bit short: bit 254-i is the coefficient of
// x^i. So every power of H is kept divided by x, which moves the product to where bit 255-i is the coefficient of x^i.
// Kept so they can be multiplied with each other: (H^i/x)(H^j/x) with the same shift is H^(i+j)/x. (S. Gueron, M. E.
// Kounavis, "Intel Carry-Less Multiplication Instruction and its Usage for Computing the GCM Mode".)
//
// 1/x = x^127+x^6+x+1, reflected 0xC2000000000000000000000000000001.
//
// # Reduction
//
// The product has four 64-bit digits Z0..Z3. Z0 and Z1 hold the degrees from 128 up. Because x^128 = x^7+x^2+x+1, the
// coefficient in bit i of Z0 (x^(255-i)) is the same as one in each of the bits 128+i, 127+i, 126+i and 121+i:
//
//	Z0 itself, added to Z2, and
//	Z0 * (2^63+2^62+2^57), added to Z1 and Z2, where the factor is 0xC200000000000000.
//
// Then Z1, with what was just added to it, goes to Z2 and Z3 likewise. The three partial products of schoolbook
// multiplication, lo = Z1:Z0, mid = Z2:Z1, hi = Z3:Z2, take part as they are: exchanging the halves of lo aligns Z0 with
// Z2 and Z1 with Z1 in mid, and exchanging those of mid does the same one digit up. A reduction is two multiplications,
// two shuffles and two XORs of three. It is linear, so one reduction serves any number of products that were added up.
//
// # Lanes
//
// A register has four lanes of one block, lane 0 the first. In the long loop each lane is a GHASH of its own, over every
// fourth block: the state Y has four lanes, and each is multiplied by H^16, H^12, H^8, H^4 as in
//
//	Y = (Y+V0) H^16 + V1 H^12 + V2 H^8 + V3 H^4
//
// The last sixteen blocks are multiplied by H^16..H^13, H^12..H^9, H^8..H^5, H^4..H^1 instead, which brings each lane to
// where it belongs, and the sum of the lanes is GHASH.
//
// # Powers of H
//
// H^20/x, H^19/x … H^1/x are in the object in this order. The end of a text is at most 16 blocks, and the block of the
// lengths comes behind it, so that H^17 is needed; a whole register of them is as cheap as one. What the object has
// behind them is read with them when a text's last register has fewer than four blocks, and multiplied by zeros: it has
// to be there, not to mean something.
#define POWER(k) (aead_powers+(20-k)*16)(AX)
#define KEY(i) (aead_keys+i*16)(AX)
#define ROUNDS aead_rounds(AX)

// Registers of ·crypt:
//
//	Z0-Z3    AES states of up to 16 blocks              AX   the object
//	Z4-Z6    lo, mid, hi                                DI   dst, SI src: the next bytes
//	Z7, Z11, Z13, Z25  ciphertext, bytes reversed       R8   where the last round key is
//	Z8, Z9, Z15  scratch                                R9   where the tag goes
//	Z10      counter blocks, bytes reversed             R10  the next powers of H
//	Z12      reverses the bytes of each lane            R11  chunks to be hashed, R12 to be encrypted
//	Z14      Y, bytes reversed                          R13  bytes after the last whole chunk
//	Z16-Z24  round keys 0-8, Z26 the last               CX, DX scratch
//	Z27      AES(J0), which hides the tag               K1   bytes there are
//	Z28-Z31  powers of H
//
// A chunk is 256 bytes, 16 blocks, Z0-Z3. What of 32 registers there is no room for, it costs least to load: constants,
// and the round keys from the ninth on, when the scratch registers are free.

DATA reverse<>+0(SB)/8, $0x08090a0b0c0d0e0f
DATA reverse<>+8(SB)/8, $0x0001020304050607
GLOBL reverse<>(SB), RODATA|NOPTR, $16

// x^7+x^2+x of the field's polynomial, reflected (see Reduction).
DATA factor<>+0(SB)/8, $0xc200000000000000
DATA factor<>+8(SB)/8, $0
DATA factor<>+16(SB)/8, $0xc200000000000000
DATA factor<>+24(SB)/8, $0
DATA factor<>+32(SB)/8, $0xc200000000000000
DATA factor<>+40(SB)/8, $0
DATA factor<>+48(SB)/8, $0xc200000000000000
DATA factor<>+56(SB)/8, $0
GLOBL factor<>(SB), RODATA|NOPTR, $64

// 1/x, reflected.
DATA inverse<>+0(SB)/8, $1
DATA inverse<>+8(SB)/8, $0xc200000000000000
GLOBL inverse<>(SB), RODATA|NOPTR, $16

// The counters of the first four blocks, beyond that of J0, and the step to the next four.
DATA ahead<>+0(SB)/8, $1
DATA ahead<>+8(SB)/8, $0
DATA ahead<>+16(SB)/8, $2
DATA ahead<>+24(SB)/8, $0
DATA ahead<>+32(SB)/8, $3
DATA ahead<>+40(SB)/8, $0
DATA ahead<>+48(SB)/8, $4
DATA ahead<>+56(SB)/8, $0
GLOBL ahead<>(SB), RODATA|NOPTR, $64
DATA step<>+0(SB)/8, $4
DATA step<>+8(SB)/8, $0
DATA step<>+16(SB)/8, $4
DATA step<>+24(SB)/8, $0
DATA step<>+32(SB)/8, $4
DATA step<>+40(SB)/8, $0
DATA step<>+48(SB)/8, $4
DATA step<>+56(SB)/8, $0
GLOBL step<>(SB), RODATA|NOPTR, $64

// RotWord of the last word of a key, in all four words, and that word as it is.
DATA rotated<>+0(SB)/8, $0x0c0f0e0d0c0f0e0d
DATA rotated<>+8(SB)/8, $0x0c0f0e0d0c0f0e0d
GLOBL rotated<>(SB), RODATA|NOPTR, $16
DATA last<>+0(SB)/8, $0x0f0e0d0c0f0e0d0c
DATA last<>+8(SB)/8, $0x0f0e0d0c0f0e0d0c
GLOBL last<>(SB), RODATA|NOPTR, $16

// The first round constant, in all four words; and the ninth.
DATA rcon<>+0(SB)/8, $0x0000000100000001
DATA rcon<>+8(SB)/8, $0x0000000100000001
DATA rcon<>+16(SB)/8, $0x0000001b0000001b
DATA rcon<>+24(SB)/8, $0x0000001b0000001b
GLOBL rcon<>(SB), RODATA|NOPTR, $32

// Four counter blocks and the first AddRoundKey.
#define COUNTER(z) \
	VPSHUFB Z12, Z10, z; \
	VPADDD  step<>(SB), Z10, Z10; \
	VPXORQ  Z16, z, z

#define COUNTERS \
	COUNTER(Z0); \
	COUNTER(Z1); \
	COUNTER(Z2); \
	COUNTER(Z3)

#define ROUND(key) \
	VAESENC key, Z0, Z0; \
	VAESENC key, Z1, Z1; \
	VAESENC key, Z2, Z2; \
	VAESENC key, Z3, Z3

// A round whose key has no register, and the four that AES-256 has more.
#define ROUND_FROM(i) \
	VBROADCASTI32X4 KEY(i), Z15; \
	ROUND(Z15)

#define ROUNDS_256 \
	ROUND_FROM(10); \
	ROUND_FROM(11); \
	ROUND_FROM(12); \
	ROUND_FROM(13)

// The last round adds its key at its end: with the text added to that key it is encrypted too.
#define FINISH(key0, key1, key2, key3) \
	VPXORQ      (SI), Z26, key0; \
	VPXORQ      64(SI), Z26, key1; \
	VPXORQ      128(SI), Z26, key2; \
	VPXORQ      192(SI), Z26, key3; \
	VAESENCLAST key0, Z0, Z0; \
	VAESENCLAST key1, Z1, Z1; \
	VAESENCLAST key2, Z2, Z2; \
	VAESENCLAST key3, Z3, Z3; \
	VMOVDQU64   Z0, (DI); \
	VMOVDQU64   Z1, 64(DI); \
	VMOVDQU64   Z2, 128(DI); \
	VMOVDQU64   Z3, 192(DI); \
	ADDQ        $256, SI; \
	ADDQ        $256, DI

// lo, mid, hi = v * h, over any width; mid has yet to be added to mid2.
#define PRODUCT(v, h, lo, mid, mid2, hi) \
	VPCLMULQDQ $0x00, h, v, lo; \
	VPCLMULQDQ $0x01, h, v, mid; \
	VPCLMULQDQ $0x10, h, v, mid2; \
	VPCLMULQDQ $0x11, h, v, hi

// The ciphertext of a chunk: what has been sealed, and what is about to be opened.
#define TAKE_SEALED \
	VPSHUFB Z12, Z0, Z7; \
	VPSHUFB Z12, Z1, Z11; \
	VPSHUFB Z12, Z2, Z13; \
	VPSHUFB Z12, Z3, Z25

#define TAKE_SOURCE \
	VMOVDQU64 (SI), Z7; \
	VMOVDQU64 64(SI), Z11; \
	VMOVDQU64 128(SI), Z13; \
	VMOVDQU64 192(SI), Z25; \
	VPSHUFB   Z12, Z7, Z7; \
	VPSHUFB   Z12, Z11, Z11; \
	VPSHUFB   Z12, Z13, Z13; \
	VPSHUFB   Z12, Z25, Z25

// GHASH of a chunk, without its reduction, in four parts. XORs of three (VPTERNLOGQ $0x96) save one in two, so partial
// products wait in the scratch registers from one part to the next.
#define HASH_FIRST \
	VPXORQ Z14, Z7, Z7; \
	PRODUCT(Z7, Z28, Z4, Z5, Z15, Z6)

#define HASH_SECOND \
	VPCLMULQDQ $0x01, Z29, Z11, Z8; \
	VPCLMULQDQ $0x10, Z29, Z11, Z9; \
	VPTERNLOGQ $0x96, Z15, Z8, Z5; \
	VPCLMULQDQ $0x00, Z29, Z11, Z8; \
	VPCLMULQDQ $0x11, Z29, Z11, Z15

#define HASH_THIRD \
	VPCLMULQDQ $0x00, Z30, Z13, Z14; \
	VPTERNLOGQ $0x96, Z14, Z8, Z4; \
	VPCLMULQDQ $0x01, Z30, Z13, Z14; \
	VPTERNLOGQ $0x96, Z14, Z9, Z5; \
	VPCLMULQDQ $0x11, Z30, Z13, Z14; \
	VPTERNLOGQ $0x96, Z14, Z15, Z6; \
	VPCLMULQDQ $0x10, Z30, Z13, Z15

#define HASH_FOURTH \
	VPCLMULQDQ $0x01, Z31, Z25, Z8; \
	VPCLMULQDQ $0x10, Z31, Z25, Z9; \
	VPTERNLOGQ $0x96, Z8, Z15, Z5; \
	VPCLMULQDQ $0x00, Z31, Z25, Z8; \
	VPCLMULQDQ $0x11, Z31, Z25, Z15; \
	VPXORQ     Z9, Z5, Z5; \
	VPXORQ     Z8, Z4, Z4; \
	VPXORQ     Z15, Z6, Z6

// The two halves of a reduction, for registers of any width. The second leaves its result in y.
#define REDUCE_LO(lo, mid, t, u) \
	VPCLMULQDQ $0x00, factor<>(SB), lo, t; \
	VPSHUFD    $0x4e, lo, u; \
	VPTERNLOGQ $0x96, t, u, mid

#define REDUCE_MID(mid, hi, t, y) \
	VPCLMULQDQ $0x00, factor<>(SB), mid, t; \
	VPSHUFD    $0x4e, mid, y; \
	VPTERNLOGQ $0x96, t, hi, y

#define REDUCE \
	REDUCE_LO(Z4, Z5, Z8, Z9); \
	REDUCE_MID(Z5, Z6, Z8, Z14)

// X14 = the sum of the lanes of Z14.
#define SUM_LANES \
	VEXTRACTI64X4 $1, Z14, Y7; \
	VPXOR         Y7, Y14, Y14; \
	VEXTRACTI128  $1, Y14, X7; \
	VPXOR         X7, X14, X14

// func crypt(a *aead, dst, src *byte, n int, nonce *byte, data *byte, dataLen int, tag *byte, opening bool)
//
// It loads no byte outside of what it is given: masked-out bytes of a load do not fault.
TEXT ·crypt(SB), NOSPLIT, $0-65
	MOVQ a+0(FP), AX
	MOVQ dst+8(FP), DI
	MOVQ src+16(FP), SI
	MOVQ n+24(FP), R12
	MOVQ nonce+32(FP), DX
	MOVQ data+40(FP), R10
	MOVQ dataLen+48(FP), R11
	MOVQ tag+56(FP), R9

	// J0 = nonce || 1, SP 800-38D 7.1. Its bytes reversed, the counter is the lowest 32-bit word. GCM counts modulo
	// 2^32 (inc32), which is what VPADDD does; the bound on a text's length keeps it from coming round.
	VMOVQ           (DX), X10
	VPINSRD         $2, 8(DX), X10, X10
	MOVL            $0x01000000, CX
	VPINSRD         $3, CX, X10, X10
	VBROADCASTI32X4 reverse<>(SB), Z12

	MOVL            ROUNDS, R8
	SHLQ            $4, R8
	LEAQ            aead_keys(AX)(R8*1), R8
	VBROADCASTI32X4 KEY(0), Z16
	VBROADCASTI32X4 KEY(1), Z17
	VBROADCASTI32X4 KEY(2), Z18
	VBROADCASTI32X4 KEY(3), Z19
	VBROADCASTI32X4 KEY(4), Z20
	VBROADCASTI32X4 KEY(5), Z21
	VBROADCASTI32X4 KEY(6), Z22
	VBROADCASTI32X4 KEY(7), Z23
	VBROADCASTI32X4 KEY(8), Z24
	VBROADCASTI32X4 (R8), Z26

	VPXORQ  X16, X10, X27
	VAESENC X17, X27, X27
	VAESENC X18, X27, X27
	VAESENC X19, X27, X27
	VAESENC X20, X27, X27
	VAESENC X21, X27, X27
	VAESENC X22, X27, X27
	VAESENC X23, X27, X27
	VAESENC X24, X27, X27
	VAESENC KEY(9), X27, X27
	CMPL    ROUNDS, $10
	JEQ     hidden
	VAESENC KEY(10), X27, X27
	VAESENC KEY(11), X27, X27
	VAESENC KEY(12), X27, X27
	VAESENC KEY(13), X27, X27

hidden:
	VAESENCLAST X26, X27, X27

	VPSHUFB    X12, X10, X10
	VSHUFI64X2 $0, Z10, Z10, Z10
	VPADDD     ahead<>(SB), Z10, Z10

	// The additional data, a block at a time: TLS has 5 or 13 bytes of it.
	VPXOR   X14, X14, X14
	VMOVDQU POWER(1), X3
	TESTQ   R11, R11
	JZ      text

data:
	MOVQ    $16, DX
	CMPQ    R11, DX
	CMOVQLT R11, DX
	MOVL    $-1, CX
	BZHIL   DX, CX, CX
	KMOVD   CX, K1
	VMOVDQU8.Z (R10), K1, X7
	VPSHUFB X12, X7, X7
	VPXOR   X14, X7, X7
	PRODUCT(X7, X3, X4, X5, X15, X6)
	VPXOR   X15, X5, X5
	REDUCE_LO(X4, X5, X7, X8)
	REDUCE_MID(X5, X6, X7, X14)
	ADDQ    DX, R10
	SUBQ    DX, R11
	JNZ     data

text:
	MOVQ R12, R13
	ANDQ $255, R13
	SHRQ $8, R12
	JZ   end

	VBROADCASTI32X4 POWER(16), Z28
	VBROADCASTI32X4 POWER(12), Z29
	VBROADCASTI32X4 POWER(8), Z30
	VBROADCASTI32X4 POWER(4), Z31
	MOVQ            R12, R11
	CMPB            opening+64(FP), $0
	JNE             source

	// What is hashed is the ciphertext: sealing, hashing follows one chunk behind.
	COUNTERS
	ROUND(Z17)
	ROUND(Z18)
	ROUND(Z19)
	ROUND(Z20)
	ROUND(Z21)
	ROUND(Z22)
	ROUND(Z23)
	ROUND(Z24)
	ROUND_FROM(9)
	CMPL ROUNDS, $10
	JEQ  first
	ROUNDS_256

first:
	FINISH(Z7, Z8, Z9, Z15)
	TAKE_SEALED
	DECQ R12
	JNZ  chunk
	JMP  behind

	// AES of a chunk while one is hashed: opening the same, sealing the one before.
source:
	TAKE_SOURCE

chunk:
	DECQ      R11
	JNZ       powers
	VMOVDQU64 POWER(16), Z28
	VMOVDQU64 POWER(12), Z29
	VMOVDQU64 POWER(8), Z30
	VMOVDQU64 POWER(4), Z31

powers:
	COUNTERS
	ROUND(Z17)
	HASH_FIRST
	ROUND(Z18)
	ROUND(Z19)
	HASH_SECOND
	ROUND(Z20)
	ROUND(Z21)
	HASH_THIRD
	ROUND(Z22)
	ROUND(Z23)
	HASH_FOURTH
	ROUND(Z24)
	REDUCE
	ROUND_FROM(9)
	CMPL ROUNDS, $10
	JEQ  next
	ROUNDS_256

next:
	FINISH(Z7, Z8, Z9, Z15)
	CMPB opening+64(FP), $0
	JNE  opened
	TAKE_SEALED
	DECQ R12
	JNZ  chunk
	JMP  behind

opened:
	DECQ R12
	JNZ  source
	JMP  sum

behind:
	VMOVDQU64 POWER(16), Z28
	VMOVDQU64 POWER(12), Z29
	VMOVDQU64 POWER(8), Z30
	VMOVDQU64 POWER(4), Z31
	HASH_FIRST
	HASH_SECOND
	HASH_THIRD
	HASH_FOURTH
	REDUCE

sum:
	SUM_LANES

	// The end of the text, R13 < 256 bytes, and behind it the block of the lengths, in bits. Y is added to the first
	// block there is.
end:
	MOVQ    n+24(FP), CX
	SHLQ    $3, CX
	VMOVQ   CX, X9
	MOVQ    dataLen+48(FP), CX
	SHLQ    $3, CX
	VPINSRQ $1, CX, X9, X9
	VMOVDQU POWER(1), X3
	TESTQ   R13, R13
	JNZ     lengths
	VPXOR   X14, X9, X9

lengths:
	PRODUCT(X9, X3, X4, X5, X15, X6)
	JZ    tag
	LEAQ  15(R13), CX
	ANDQ  $-16, CX
	LEAQ  POWER(1), R10
	SUBQ  CX, R10
	VBROADCASTI32X4 KEY(9), Z25

quarter:
	MOVQ       $-1, CX
	BZHIQ      R13, CX, CX
	KMOVQ      CX, K1
	VMOVDQU8.Z (SI), K1, Z1
	COUNTER(Z0)
	VAESENC    Z17, Z0, Z0
	VAESENC    Z18, Z0, Z0
	VAESENC    Z19, Z0, Z0
	VAESENC    Z20, Z0, Z0
	VAESENC    Z21, Z0, Z0
	VAESENC    Z22, Z0, Z0
	VAESENC    Z23, Z0, Z0
	VAESENC    Z24, Z0, Z0
	VAESENC    Z25, Z0, Z0
	CMPL       ROUNDS, $10
	JEQ        quartered
	VBROADCASTI32X4 KEY(10), Z28
	VBROADCASTI32X4 KEY(11), Z29
	VBROADCASTI32X4 KEY(12), Z30
	VBROADCASTI32X4 KEY(13), Z31
	VAESENC    Z28, Z0, Z0
	VAESENC    Z29, Z0, Z0
	VAESENC    Z30, Z0, Z0
	VAESENC    Z31, Z0, Z0

quartered:
	VPXORQ      Z1, Z26, Z2
	VAESENCLAST Z2, Z0, Z0
	VMOVDQU8    Z0, K1, (DI)
	CMPB        opening+64(FP), $0
	JNE         ciphertext
	VMOVDQU8.Z  Z0, K1, Z1

ciphertext:
	VPSHUFB    Z12, Z1, Z7
	VPXORQ     Z14, Z7, Z7
	VPXOR      X14, X14, X14
	VMOVDQU64  (R10), Z3
	VPCLMULQDQ $0x00, Z3, Z7, Z8
	VPXORQ     Z8, Z4, Z4
	VPCLMULQDQ $0x01, Z3, Z7, Z8
	VPCLMULQDQ $0x10, Z3, Z7, Z9
	VPTERNLOGQ $0x96, Z8, Z9, Z5
	VPCLMULQDQ $0x11, Z3, Z7, Z8
	VPXORQ     Z8, Z6, Z6
	ADDQ       $64, SI
	ADDQ       $64, DI
	ADDQ       $64, R10
	SUBQ       $64, R13
	JHI        quarter

tag:
	VPXORQ  Z15, Z5, Z5
	REDUCE
	SUM_LANES
	VPSHUFB X12, X14, X14
	VPXORQ  X27, X14, X14
	VMOVDQU X14, (R9)

	// No key, no power of H and no tag is left behind. VZEROALL knows the first 16 registers only; the others, as long
	// as there is something in them, make each switch of threads dearer by a kilobyte.
	VZEROALL
	VPXORQ X16, X16, X16
	VPXORQ X17, X17, X17
	VPXORQ X18, X18, X18
	VPXORQ X19, X19, X19
	VPXORQ X20, X20, X20
	VPXORQ X21, X21, X21
	VPXORQ X22, X22, X22
	VPXORQ X23, X23, X23
	VPXORQ X24, X24, X24
	VPXORQ X25, X25, X25
	VPXORQ X26, X26, X26
	VPXORQ X27, X27, X27
	VPXORQ X28, X28, X28
	VPXORQ X29, X29, X29
	VPXORQ X30, X30, X30
	VPXORQ X31, X31, X31
	RET

// The next round key in key: the running XOR of its words, and the last word (of the key before) after SubWord and what
// select and rc do. AESENCLAST is SubBytes, ShiftRows and AddRoundKey; ShiftRows leaves four equal columns as they are.
#define NEXT_KEY(key, before, select, rc) \
	VPSHUFB     select, before, X8; \
	VAESENCLAST rc, X8, X8; \
	VPSLLDQ     $4, key, X9; \
	VPXOR       X9, key, key; \
	VPSLLDQ     $8, key, X9; \
	VPXOR       X9, key, key; \
	VPXOR       X8, key, key; \
	VMOVDQU     key, (R8); \
	ADDQ        $16, R8

// y = v * h, over any width, where all have x in the denominator.
#define MULTIPLY(v, h, lo, mid, hi, t, u, y) \
	PRODUCT(v, h, lo, mid, t, hi); \
	VPXORQ t, mid, mid; \
	REDUCE_LO(lo, mid, t, u); \
	REDUCE_MID(mid, hi, t, y)

// func setUp(a *aead, key *byte)
//
// X0, X1 the last two round keys, X2 what becomes H, X3 the round constant, X4 and X5 the selections, X6 zero.
TEXT ·setUp(SB), NOSPLIT, $0-16
	MOVQ    a+0(FP), AX
	MOVQ    key+8(FP), SI
	LEAQ    aead_keys(AX), R8
	VMOVDQU rcon<>(SB), X3
	VMOVDQU rotated<>(SB), X4
	VMOVDQU last<>(SB), X5
	VPXOR   X6, X6, X6
	VMOVDQU (SI), X0
	VMOVDQU X0, (R8)
	VMOVDQA X0, X2 // zero, after the first AddRoundKey
	CMPL    ROUNDS, $10
	JNE     long

	// FIPS 197 5.2. The round constants double until they leave the byte.
	ADDQ $16, R8
	MOVL $8, CX

short:
	NEXT_KEY(X0, X0, X4, X3)
	VAESENC X0, X2, X2
	VPSLLD  $1, X3, X3
	DECL    CX
	JNZ     short
	VMOVDQU rcon<>+16(SB), X3
	NEXT_KEY(X0, X0, X4, X3)
	VAESENC X0, X2, X2
	VPSLLD  $1, X3, X3
	NEXT_KEY(X0, X0, X4, X3)
	VAESENCLAST X0, X2, X2
	JMP     hash

long:
	VMOVDQU 16(SI), X1
	VMOVDQU X1, 16(R8)
	VAESENC X1, X2, X2
	ADDQ    $32, R8
	MOVL    $6, CX

two:
	NEXT_KEY(X0, X1, X4, X3)
	VAESENC X0, X2, X2
	NEXT_KEY(X1, X0, X5, X6)
	VAESENC X1, X2, X2
	VPSLLD  $1, X3, X3
	DECL    CX
	JNZ     two
	NEXT_KEY(X0, X1, X4, X3)
	VAESENCLAST X0, X2, X2

	// H/x: one bit up, and what leaves at the top (x^0) comes back as 1/x.
hash:
	VPSHUFB reverse<>(SB), X2, X2
	VPSHUFD $0xff, X2, X7
	VPSRAD  $31, X7, X7
	VPAND   inverse<>(SB), X7, X7
	VPSRLQ  $63, X2, X8
	VPSLLDQ $8, X8, X8
	VPADDQ  X2, X2, X2
	VPTERNLOGQ $0x96, X7, X8, X2

	// H^2; H^4 and H^3; then four at a time, with H^4, H^8 and H^8 again.
	MULTIPLY(X2, X2, X4, X5, X6, X7, X8, X0)
	VINSERTI128 $1, X2, Y0, Y1
	VINSERTI128 $1, X0, Y0, Y0
	MULTIPLY(Y1, Y0, Y4, Y5, Y6, Y7, Y8, Y0)
	VINSERTI64X4 $1, Y1, Z0, Z0
	VMOVDQU64  Z0, POWER(4)
	VSHUFI64X2 $0, Z0, Z0, Z2
	MULTIPLY(Z0, Z2, Z4, Z5, Z6, Z7, Z8, Z1)
	VMOVDQU64  Z1, POWER(8)
	VSHUFI64X2 $0, Z1, Z1, Z2
	MULTIPLY(Z0, Z2, Z4, Z5, Z6, Z7, Z8, Z3)
	VMOVDQU64  Z3, POWER(12)
	MULTIPLY(Z1, Z2, Z4, Z5, Z6, Z7, Z8, Z9)
	VMOVDQU64  Z9, POWER(16)
	MULTIPLY(Z3, Z2, Z4, Z5, Z6, Z7, Z8, Z9)
	VMOVDQU64  Z9, POWER(20)
	VZEROALL
	RET
